"""The InternVLFineTune operator: a thin kopf shell around a pure core."""
