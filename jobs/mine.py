"""Mines hard negatives: ``ray job submit --working-dir . -- python jobs/mine.py --model MODEL --queries Q --corpus C --out OUT``.

Takes the arguments of ``llmemb mine``.
"""

import sys

from llmemb_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["mine", *sys.argv[1:]]))
