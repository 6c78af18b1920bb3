"""Embeds a corpus: ``ray job submit --working-dir . -- python jobs/embed.py INPUT... OUTPUT --model MODEL``.

Takes the arguments of ``llmemb embed``.
"""

import sys

from llmemb_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["embed", *sys.argv[1:]]))
