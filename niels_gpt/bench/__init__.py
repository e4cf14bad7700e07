"""What this machine trains how fast: one trial in a process of its own, a search for the largest microbatch, a sweep."""
