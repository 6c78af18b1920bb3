"""Fine-tunes a model: ``ray job submit --working-dir . -- python jobs/finetune.py --model MODEL --train DATA --out OUT``.

Takes the arguments of ``llmemb finetune``.
"""

import sys

from llmemb_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
