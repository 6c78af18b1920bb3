"""Plans a corpus: ``ray job submit --working-dir . -- python jobs/plan.py INPUT... OUTPUT --model MODEL``, or a synthesis: ``jobs/plan.py synthesize …``.

Takes the arguments of ``llmemb plan`` and ``llmemb plan synthesize``; for corpora, models and outputs that only the cluster can reach.
"""

import sys

from llmemb_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
