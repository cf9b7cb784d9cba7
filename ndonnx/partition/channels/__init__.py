"""Which channels can go together: labels on axes, rules for operators, groups of weights."""
