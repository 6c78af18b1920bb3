"""Compares the backends: ``ray job submit --working-dir . -- python jobs/parity.py [INPUT...] --model MODEL``.

Takes the arguments of ``llmemb parity``; runs on the node that the job is started on.
"""

import sys

from llmemb_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["parity", *sys.argv[1:]]))
