"""What a variant costs: velocity errors, likeness of the pictures, and the score of a world's checker."""
