"""scripts/gpu-check with the CPU in the place of a GPU: that it checks what it says, and finds what is wrong."""

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu-check"


@pytest.fixture
def gpu_check(monkeypatch):
    loader = SourceFileLoader("gpu_check", str(SCRIPT))
    module = module_from_spec(spec_from_loader("gpu_check", loader))
    loader.exec_module(module)
    for ops in ["KERNELS", "GRAPHS"]:
        monkeypatch.setenv(f"RELORA_CUDA_{ops}", "0")  # the script sets them, and they are put back after the test
    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module, "CHECKS", {name: module.CHECKS[name] for name in ["relora", "int8", "nf4"]})
    monkeypatch.setattr(module, "FIXTURES", {"fixture magnitude": "magnitude"})
    return module


def results_of(gpu_check, folder):
    data = gpu_check.write_data(folder / "data")
    with ThreadPoolExecutor(2) as pool:
        cpu = gpu_check.run_on_cpu(data, folder, pool)
        return {result["check"]: result for result in gpu_check.check_all("libtorch", cpu, data, folder / "ops", pool)}


def test_a_device_that_computes_as_the_cpu_does_holds(gpu_check, tmp_path):
    results = results_of(gpu_check, tmp_path)
    assert list(results) == ["relora", "int8", "nf4", *gpu_check.GRADIENTS, "fixture magnitude"]
    assert [result for result in results.values() if not result["held"]] == []
    assert results["relora"]["weight_error"] == 0 and results["relora"]["last_loss"] < 6
    assert 0 < results["nf4"]["loss_error_to_fp32"] < gpu_check.QUANTISED_BOUNDS["nf4"]
    assert results["gradients at full rank"]["gradients"] == 3 + 3 * 9
    assert results["gradients at low rank"]["gradients"] == 3 + 3 * (2 + 2 * 7)
    line = "libtorch relora held loss_error 0.0e+00 weight_error 0.0e+00"
    assert gpu_check.line_of(results["relora"]).split() == line.split()


def test_a_device_that_computes_something_else_is_found(gpu_check, tmp_path, monkeypatch):
    """Here it turns queries and keys by slightly other angles."""
    original = gpu_check.spec_of

    def another_theta(method, changes, device):
        made = original(method, changes, "cpu")
        made["model"]["rope_theta"] *= 1.1 if device == "other" else 1.0
        return made

    monkeypatch.setattr(gpu_check, "spec_of", another_theta)
    monkeypatch.setattr(gpu_check, "DEVICE", "other")
    results = results_of(gpu_check, tmp_path)
    assert [result for result in results.values() if result["held"]] == []
    assert "FAILED" in gpu_check.line_of(results["fixture magnitude"])
    assert results["relora"]["same_bits_from_a_state"], results
    assert "unknown variant `other`" in results["fixture magnitude"]["detail"], results


def test_another_trajectory_and_other_bits_from_a_state_are_found(gpu_check, tmp_path, monkeypatch):
    fixture = json.loads((gpu_check.fixtures.FOLDER / "magnitude.json").read_text())
    fixture["losses"][-1] *= 1.001
    (tmp_path / "magnitude.json").write_text(json.dumps(fixture))
    monkeypatch.setattr(gpu_check.fixtures, "FOLDER", tmp_path)
    hashes = itertools.count()
    monkeypatch.setattr(gpu_check, "final_sha256", lambda run: next(hashes))
    monkeypatch.setattr(gpu_check, "CHECKS", {"relora": gpu_check.CHECKS["relora"]})
    monkeypatch.setattr(gpu_check, "GRADIENTS", {})
    results = results_of(gpu_check, tmp_path)
    assert [result["held"] for result in results.values()] == [False, False], results
    assert not results["relora"]["same_bits_from_a_state"] and results["relora"]["weight_error"] == 0
    assert 5e-4 < results["fixture magnitude"]["loss_error"] < 2e-3


def test_what_a_gpu_computes_with_is_told_by_its_name(gpu_check):
    names = ["cuda (NVIDIA H200)", "cuda (NVIDIA H200, fused kernels)", "cuda (NVIDIA H200, fused kernels in graphs)"]
    assert [gpu_check.ops_named_in(name) for name in names] == gpu_check.OPS
