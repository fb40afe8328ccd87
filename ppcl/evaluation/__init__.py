"""What a variant costs: velocity errors, latency, similarity of its images, and the score of a prompt checker."""
