"""Evaluates a model: ``ray job submit --working-dir . -- python jobs/evaluate.py --model MODEL --suite sts --data DIR --out OUT``.

Takes the arguments of ``llmemb evaluate``.
"""

import sys

from llmemb_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
