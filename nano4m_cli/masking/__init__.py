"""What is shown and what is asked: pure functions of (specs, lengths, seed, sample counters), one component a file."""
