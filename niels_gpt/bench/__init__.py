"""What this machine trains how fast: a trial in a process of its own, the search for a microbatch, a sweep of both."""
