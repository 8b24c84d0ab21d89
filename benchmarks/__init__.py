"""Comparisons: each script measures ours and its peers in one run, interleaved, and reports ratios."""
