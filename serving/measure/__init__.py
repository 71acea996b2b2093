"""What is measured of the plug-in: exactness, throughput, and a soak; run as `python -m serving.measure.NAME`."""
