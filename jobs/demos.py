"""Makes or chooses demonstrations: ``ray job submit --working-dir . -- python jobs/demos.py select --model MODEL --candidates FILE --out OUT``.

Takes the arguments of ``llmemb demos build`` and ``llmemb demos select``.
"""

import sys

from llmemb_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["demos", *sys.argv[1:]]))
