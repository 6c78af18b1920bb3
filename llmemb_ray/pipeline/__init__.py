"""The embedding job: plan, prepare, embed, commit, reconcile; on Ray Data or in one process."""
