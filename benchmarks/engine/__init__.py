"""All that the cases of the benchmark share: inputs, gates, clocks, counts, plans and reports."""
