"""Plans a corpus: ``ray job submit --working-dir . -- python jobs/plan.py INPUT... OUTPUT --model MODEL``.

Takes the arguments of ``llmemb plan``; for corpora that only the cluster can reach.
"""

import sys

from llmemb_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
