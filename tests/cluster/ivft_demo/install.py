"""Installs the operator into a cluster: images from the project's Dockerfiles, release from its chart."""

from __future__ import annotations

from typing import Any, NamedTuple

from ivft_cluster import helm
from ivft_cluster.cluster import Cluster
from ivft_cluster.images import component_image
from ivft_cluster.oci import Image
from ivft_cluster.shell import phase


class Images(NamedTuple):
    """Both images, built from the current checkout."""

    operator: Image
    trainer: Image


def build_images() -> Images:
    """Build changed images (seconds if nothing changed)."""
    with phase("operator's image"):
        operator = component_image("operator")
    with phase("trainer's image"):
        trainer = component_image("trainer")
    return Images(operator, trainer)


def chart_values(images: Images, **settings: Any) -> dict[str, Any]:
    """Values that run these images; `settings` are the operator's own, in camelCase."""
    return {
        "image": image_values(images.operator.name),
        "trainer": {"image": image_values(images.trainer.name)},
        # A run of one minute needs more frequent polling than a run of days.
        "settings": {"progressIntervalSeconds": 1, "retryBaseSeconds": 2, **settings},
    }


def image_values(reference: str) -> dict[str, str]:
    """Values of a reference `repository:tag`."""
    repository, _, tag = reference.rpartition(":")
    return {"repository": repository, "tag": tag}


def install_operator(cluster: Cluster, images: Images, **settings: Any) -> None:
    """Helm install; returns when the operator is ready. Raises helm.HelmReleaseError."""
    release = helm.install(cluster.kubeconfig, chart_values(images, **settings))
    with phase(f"release {release['name']}: {release['status']}"):
        pass
