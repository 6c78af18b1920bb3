"""Makes training data: ``ray job submit --working-dir . -- python jobs/synthesize.py --llm LLM --out OUT``.

Takes the arguments of ``llmemb synthesize``.
"""

import sys

from llmemb_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["synthesize", *sys.argv[1:]]))
