"""Devices that are not here: cards, drivers and versions of torch are invented."""

import logging
import os
import subprocess
from types import SimpleNamespace

import pytest
import torch

from microvllm import devices
from microvllm.devices import check_support, cuda_problem, find_device

CARD = torch.device("cuda", 0)
LINUX = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Thu Feb  1 01:00:00 UTC 2024\nGCC"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (x@y)"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine without cards, with a torch that is built for CUDA 13."""
    monkeypatch.setattr(devices, "PROC", tmp_path / "proc")
    monkeypatch.setattr(devices, "DEV", tmp_path / "dev")
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    devices._warn.cache_clear()
    yield tmp_path
    devices._warn.cache_clear()


def install(machine, driver: str, form: str = LINUX, has_card: bool = True):
    """The files of a driver."""
    (machine / "proc" / "driver" / "nvidia").mkdir(parents=True)
    (machine / "proc" / "driver" / "nvidia" / "version").write_text(form.format(driver))
    if has_card:
        (machine / "dev").mkdir()
        (machine / "dev" / "nvidiactl").touch()


def test_without_a_driver_nothing_is_said(machine, caplog):
    assert cuda_problem() is None and find_device("auto") == torch.device("cpu")
    assert not caplog.records


@pytest.mark.parametrize("form", [LINUX, OPEN])
@pytest.mark.parametrize(
    "driver, built, words",
    [
        ("535.104.05", "13.0", ["too old", "CUDA 13.0", "cu126", "torch<2.15", "580 or newer"]),
        ("470.82", "12.8", ["too old", "CUDA 12.8", "update the driver to version 525"]),
        ("570.86.15", None, ["built without CUDA", "cu126"]),
        ("580.65.06", None, ["built without CUDA", "cu130"]),
        ("610.1", "13.0", ["CUDA does not work", "out of order", "nvidia-smi"]),
        ("550.54", "12.8", ["CUDA does not work", "out of order"]),
    ],
)
def test_a_driver_without_cuda_is_explained(
    machine, monkeypatch, caplog, form, driver, built, words
):
    install(machine, driver, form)
    monkeypatch.setattr(torch.version, "cuda", built)

    def init():
        raise RuntimeError("the card is out of order")

    monkeypatch.setattr(torch.cuda, "init", init)
    for _ in range(2):
        assert find_device("auto") == torch.device("cpu")
    (record,) = caplog.records  # once
    assert record.levelno == logging.WARNING
    assert "computes on the CPU" in record.getMessage()
    for word in [driver, *words]:
        assert word in record.getMessage()


def test_cards_that_are_not_for_this_process_are_not_missed(machine, monkeypatch, caplog):
    install(machine, "535.104.05", has_card=False)  # a container: the host's driver
    assert cuda_problem() is None
    (machine / "dev").mkdir()
    (machine / "dev" / "nvidiactl").touch()
    assert cuda_problem() is not None
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert cuda_problem() is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cuda_problem() is None
    find_device("cpu")
    assert not caplog.records


@pytest.mark.parametrize(
    "answer, version",
    [
        ("527.41\n527.41\n", "527.41"),
        ("NVIDIA-SMI has failed", None),
        (OSError("no such program"), None),
        (subprocess.TimeoutExpired("nvidia-smi", 10), None),
    ],
)
def test_windows_asks_nvidias_program(machine, monkeypatch, answer, version):
    monkeypatch.setattr(devices.shutil, "which", lambda name: os.path.join("C:", name))

    def run(command, **_):
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(stdout=answer)

    monkeypatch.setattr(devices.subprocess, "run", run)
    assert devices._nvidia_driver() == version


# cards --------------------------------------------------------------------------------------------

CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    "capability, architectures, remedy",
    [
        ((7, 5), CU130, None),
        ((8, 9), CU130, None),  # runs what is for 8.6
        ((12, 1), CU130, None),
        ((13, 0), CU130, None),  # compiled from compute_120
        ((6, 1), CU130, "cu126"),
        ((7, 0), CU130, "cu126"),
        ((3, 7), CU130, "newer torch"),
        ((12, 0), ["sm_80", "sm_90"], "newer torch"),
        ((9, 0), ["sm_90a"], None),
        ((9, 1), ["sm_90a", "compute_90a"], "newer torch"),
        ((10, 3), ["sm_100f"], None),
        ((6, 1), [], None),  # torch does not say
        ((8, 0), ["gfx942"], "newer torch"),
    ],
)
def test_a_card_without_kernels_is_refused(monkeypatch, capability, architectures, remedy):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: architectures)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla")
    if remedy is None:
        assert find_device(CARD) == CARD
        return
    with pytest.raises(ValueError, match="'cuda:0' is a Tesla.*device='cpu'") as raised:
        find_device(CARD)
    assert remedy in str(raised.value) and "{}.{}".format(*capability) in str(raised.value)
    monkeypatch.setattr(torch.version, "hip", "7.0")  # whose cards have other names
    check_support(CARD)


# Macs ---------------------------------------------------------------------------------------------


def test_auto_is_the_cpu_on_macs(machine, monkeypatch, caplog):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert find_device("auto") == torch.device("cpu") and not caplog.records


@pytest.mark.parametrize("version", ["2.7.1", "2.8.0", "2.9.1", "2.10.0a0+git1", "2.11.0", "3.0"])
def test_versions_whose_attention_is_wrong_on_macs_are_refused(
    machine, monkeypatch, caplog, version
):
    monkeypatch.setattr(torch, "__version__", version)
    if version.startswith(("2.8", "2.9", "2.10")):
        with pytest.raises(ValueError, match=r"device='mps'.*torch>=2\.11.*device='cpu'"):
            find_device("mps")
    else:
        assert find_device("mps").type == "mps"
        (record,) = caplog.records
        assert "nothing was tested or measured" in record.getMessage()
