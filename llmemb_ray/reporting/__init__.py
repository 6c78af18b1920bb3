"""The report of a run: figures collected as plain data, drawn, and written as one page that needs nothing else."""
