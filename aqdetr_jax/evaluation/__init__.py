"""Evaluation: predictions to COCO results, COCO results to average precision."""
