"""Fine-tuning that stays pluggable: the replacements learn end to end, over plans drawn anew at every step."""
