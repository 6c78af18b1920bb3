"""Searches a run: ``ray job submit --working-dir . -- python jobs/search.py RUN --queries FILE --out FILE.parquet``.

Takes the arguments of ``llmemb search``; the shards are spread over the cluster.
"""

import sys

from llmemb_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["search", "--on-cluster", *sys.argv[1:]]))
