"""A real Kubernetes on one Debian machine: the harness of the integration and end-to-end tests and of the demo.

`Cluster` is two kubelets with containerd in their own namespaces, with object storage, Prometheus and DNS;
`ApiServer` is etcd and kube-apiserver alone, on loopback; `S3Server` is object storage alone, on loopback.
"""
