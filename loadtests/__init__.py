"""The outside view: starts servers as anyone would and speaks HTTP to them, nothing else."""
