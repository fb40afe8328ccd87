import pytest
import yaml


@pytest.fixture
def write(tmp_path):
    """Writes a configuration, of text or of values; gives its path."""

    def write(values):
        path = tmp_path / "job.yaml"
        path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
        return path

    return write
