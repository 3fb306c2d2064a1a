"""The parts of a pod that a run may set, in Kubernetes' own format and with bounds.

Every part is a TypedDict: a checked value stays the plain dict that the user wrote, so it goes into a pod unchanged. A
newer Kubernetes may know more fields; a spec that has them is refused rather than run without them.
Reference: Kubernetes API reference, core/v1.
"""
