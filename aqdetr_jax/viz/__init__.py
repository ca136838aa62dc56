"""Pictures and reports: training curves, detections, attention maps, the HTML report."""
