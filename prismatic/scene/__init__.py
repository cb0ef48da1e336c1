"""What LIBERO has, and what its state says: suites, signals of an episode, how far it got and why it ended."""
