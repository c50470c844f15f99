"""What every case of the benchmark needs: inputs, gates, clocks, counts, plans and reports."""
