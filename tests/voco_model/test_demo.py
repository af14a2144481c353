"""``make demo`` on its real path, but for fewer tokens; and the arithmetic that it prints."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("matplotlib", reason="the demo needs the extra 'bench'")
pytest.importorskip("rich", reason="the demo needs the extra 'bench'")

from PIL import Image  # noqa: E402

from voco_model import demo  # noqa: E402


def test_cache_sizes_of_llava_7b_are_those_of_the_paper():
    """The paper's Table 7 says 302.4 MB against 0.525 MB; its formula gives these."""
    assert demo.cache_bytes(32, 32, 128, 576, torch.bfloat16) == 301_989_888
    assert demo.cache_bytes(32, 32, 128, 1, torch.bfloat16) == 524_288
    sizes = [12_288, 524_288, 7_077_888, 301_989_888]
    assert [demo.readable(size) for size in sizes] == ["12.3 kB", "0.52 MB", "7 MB", "302 MB"]


def test_both_routes_agree_on_a_real_photograph(tmp_path, capsys):
    status = demo.main(["--new-tokens", "3", "--question", "Who?", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert status == 0
    assert "identical, token by token: yes (1 x 3 tokens)" in printed
    assert "302 MB" in printed and "0.52 MB" in printed
    with Image.open(tmp_path / "mask.png") as drawing:
        assert drawing.format == "PNG" and min(drawing.size) > 200


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--image", "no-such-file.jpg"], "no-such-file.jpg"),
        (["--num-voco", "0"], "got 0 and 16"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
