"""`ppcl architectures`: every record is listed, as text and as JSON."""

import json

from typer.testing import CliRunner

from jobs.cli.main import app
from ppcl.models import records


def said(*arguments):
    result = CliRunner().invoke(app, ["architectures", *arguments])
    assert result.exit_code == 0
    return result.output


def test_the_text_names_every_family_and_why_something_is_not():
    text = said()
    for record in records():
        assert f"{record.name}: {record.transformer}\n" in text
        assert all(why in text for why in (*record.notes.values(), *record.uncalibrated.values()))
    assert "left out: HiDreamImageTransformer2DModel" in text


def test_json_says_what_can_be_done_with_each():
    rows = {row["transformer"]: row for row in json.loads(said("--json"))["supported"]}
    assert set(rows) == {record.transformer for record in records()}
    assert rows["FluxTransformer2DModel"]["jobs"] == ["FluxPipeline"] and rows["FluxTransformer2DModel"]["widths"]
    flux2 = rows["Flux2Transformer2DModel"]
    assert flux2["depth"] and not flux2["widths"] and "gated" in flux2["limits"]["width"]
    assert "HunyuanVideoPipeline" not in rows["HunyuanVideoTransformer3DModel"]["jobs"]
