"""Scorers: what gives one number to an image, such as CLIPScore, and how it is found, loaded and checked.

A scorer is a function `score(prompts, images, metadata)`, or a class whose instances are called so:

- `prompts`: `N` texts;
- `images`: `(N, H, W, 3)` uint8;
- `metadata`: `N` dicts with `category`, `suite`, `variant`, `seed`, every column of the suite's line, and `teacher`,
  the teacher's image of the same prompt and seed, `(H, W, 3)` uint8.

It gives `N` numbers, or `N` booleans: whether each image is right. Larger is better, unless the configuration says
otherwise. A function gets the configuration's arguments with each call, a class once, when it is made.
"""

from ppcl.scorers.loading import BUILT_IN, Scorer, checked_scores, load_scorer

__all__ = ["BUILT_IN", "Scorer", "checked_scores", "load_scorer"]
