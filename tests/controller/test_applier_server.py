"""What a real API server makes of a status that is meant for an earlier run of the same name."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from controller.operator_process import Cluster
from internvl_api.status import UNOBSERVED, InternVLFineTuneStatus, StageStatus
from internvl_operator.core.run import read_run
from internvl_operator.kube.applier import Applier
from internvl_operator.kube.cache import RunCache
from internvl_operator.kube.client import Api, ApiError
from ivft_cluster.api_server import ApiServer

pytestmark = pytest.mark.integration


def test_an_empty_text_is_kept_and_not_written_again(served: ApiServer, cluster_of_test: Cluster) -> None:
    cluster_of_test.create()
    status = InternVLFineTuneStatus(phase="Running", progress_text="", stages=[StageStatus(name="train", message="")])
    api = Api(served.api.configuration, timeout=30, connections=1)
    with ThreadPoolExecutor(1) as executor:
        applier = Applier(api, RunCache(), {}, executor)
        assert applier.write_status(read_run(cluster_of_test.get()), status)
        stored = cluster_of_test.get()
        assert not applier.write_status(read_run(stored), status)
    assert stored["status"] == {"observedGeneration": UNOBSERVED} | status.to_dict()
    assert stored["status"]["progressText"] == ""
    cluster_of_test.delete()


def test_a_run_made_again_does_not_get_the_status_of_the_earlier_one(
    served: ApiServer, cluster_of_test: Cluster
) -> None:
    earlier = read_run(cluster_of_test.create())
    cluster_of_test.delete()
    cluster_of_test.create()
    api = Api(served.api.configuration, timeout=30, connections=1)
    with ThreadPoolExecutor(1) as executor:
        applier = Applier(api, RunCache(), {}, executor)
        with pytest.raises(ApiError, match="409 Conflict"):
            applier.write_status(earlier, InternVLFineTuneStatus(phase="Running"))
        assert cluster_of_test.get()["status"] == {"observedGeneration": UNOBSERVED}
        assert applier.write_status(read_run(cluster_of_test.get()), InternVLFineTuneStatus(phase="Pending"))
    assert cluster_of_test.get()["status"]["phase"] == "Pending"
    cluster_of_test.delete()
