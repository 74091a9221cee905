"""Clusters that encrypt their messages, and clusters that start a worker only when there is something to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask.config
import pytest
from dask.distributed import LocalCluster, Security
from helpers.clusters import texts_spec
from helpers.fault_cases import cache_content, extract_texts, write_texts

from pipeline.extraction.distributed import dispatch_extraction
from pipeline.runtime import executor
from pipeline.runtime.errors import UserError

NO_DASHBOARD: dict[str, Any] = {"dashboard_address": None, "scheduler_kwargs": {"dashboard": False}}


def make_cluster(**options: Any) -> Any:
    """A cluster of dask's own, as a user makes it."""
    return LocalCluster(**NO_DASHBOARD, **options)


def extract_on(scheduler: str, home: Path) -> Path:
    spec = texts_spec(home)
    path = dispatch_extraction(
        scheduler, (), home, spec.dataset, spec.encoder, dict(spec.settings), spec.store_dtype, spec.compiled, spec.options
    )
    assert isinstance(path, Path)
    return path


@pytest.mark.filterwarnings("ignore::UserWarning")  # dask's own: the port of the dashboard, a task graph's size
def test_an_encrypted_cluster_starts_its_workers_when_they_are_needed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The certificates are dask's own settings; the client that does not have them is refused."""
    expected = cache_content(extract_texts(write_texts(tmp_path, 60), tmp_path / "whole"))
    security = Security.temporary()
    certificates = security.get_tls_config_for_role("client")
    settings = {
        "distributed.comm.tls.ca-file": certificates["ca_file"],
        "distributed.comm.tls.client.cert": certificates["cert"],
        "distributed.comm.tls.client.key": certificates["key"],
    }
    with make_cluster(n_workers=0, threads_per_worker=1, protocol="tls://", security=security) as cluster:
        cluster.adapt(minimum=0, maximum=1)
        assert cluster.scheduler_address.startswith("tls://")
        with pytest.raises(
            UserError,
            match=r"no encrypted dask scheduler of these certificates answers at .* name them in the environment, DASK_",
        ):
            extract_on(cluster.scheduler_address, tmp_path)
        with dask.config.set(settings):
            assert cache_content(extract_on(cluster.scheduler_address, tmp_path)) == expected
    assert "has no workers yet; waiting for the first one" in caplog.text


def test_a_cluster_without_workers_is_named_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "FIRST_WORKER_SECONDS", 0.1)
    write_texts(tmp_path, 4)
    with make_cluster(n_workers=0, processes=False, protocol="tcp://") as cluster:
        address = cluster.scheduler_address
        with pytest.raises(UserError, match=r"got no workers in .* minutes; start some with: dask worker tcp://"):
            extract_on(address, tmp_path)


def test_an_address_without_encryption_is_refused_where_dask_asks_for_it(tmp_path: Path) -> None:
    write_texts(tmp_path, 4)
    with (
        dask.config.set({"distributed.comm.require-encryption": True}),
        pytest.raises(UserError, match=r"REQUIRE_ENCRYPTION\), but tcp://127.0.0.1:9 has none: give tls://127.0.0.1:9"),
    ):
        extract_on("tcp://127.0.0.1:9", tmp_path)
