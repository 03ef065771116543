"""The scaling study: grids of runs, jobs, results, claims."""
