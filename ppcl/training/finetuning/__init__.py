"""Fine-tuning that stays pluggable: the replacements learn end to end, over random plans, one per step."""
