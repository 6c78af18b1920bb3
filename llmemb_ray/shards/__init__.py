"""What stands in OUT: plan, shards, rejects, commits, receipt; and reading it back."""

from llmemb_ray.shards.commits import Commit
from llmemb_ray.shards.plan import Plan
from llmemb_ray.shards.receipt import Receipt
from llmemb_ray.shards.run import Run, open_run

__all__ = ["Commit", "Plan", "Receipt", "Run", "open_run"]
