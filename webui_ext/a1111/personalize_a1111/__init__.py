"""What is A1111's and its forks' own: the bridge as a route of theirs, their settings, their memory."""
