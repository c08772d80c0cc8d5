"""Look-alike pairs for a benchmark of one's own: proposed by features, judged on a page, written as a pair list."""
