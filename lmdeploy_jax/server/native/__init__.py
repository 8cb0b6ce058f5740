"""LMDeploy's own /generate and /get_ppl."""
