"""Every revision goes up and down on both databases, and ends at the tables the code uses."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, inspect, text

import migrations
from feature_store import schema
from feature_store.config import FeatureStoreConfig, parse_url
from feature_store.engine import build_engine, writing
from feature_store.errors import SchemaDriftError, SchemaRevisionError
from feature_store.tables import SCHEMA_REVISION, metadata

FOLDER = Path(migrations.__file__).parent


def scripts() -> ScriptDirectory:
    config = Config()
    config.set_main_option("script_location", str(FOLDER))
    return ScriptDirectory.from_config(config)


def tables_in(url: str) -> set[str]:
    engine = create_engine(parse_url(url))
    names = set(inspect(engine).get_table_names())
    engine.dispose()
    return names - {"alembic_version"}


def run(url: str, statement: str) -> None:
    engine = build_engine(FeatureStoreConfig(url=url))
    with writing(engine) as connection:
        connection.execute(text(statement))
    engine.dispose()


def test_migrating_builds_exactly_the_tables_the_code_uses(url: str) -> None:
    schema.migrate(url)
    schema.check(url)
    assert schema.current(url) == SCHEMA_REVISION
    assert tables_in(url) == set(metadata.tables)


def test_migrating_twice_changes_nothing(url: str) -> None:
    schema.migrate(url)
    run(url, "INSERT INTO id_name (kind, id, name) VALUES ('user', 1, 'ann')")
    schema.migrate(url)
    schema.check(url)


def test_every_revision_goes_up_down_and_up_again(url: str) -> None:
    for revision in reversed(list(scripts().walk_revisions())):
        before = tables_in(url)
        schema.migrate(url, revision.revision)
        after = tables_in(url)
        assert revision.down_revision is None or isinstance(revision.down_revision, str)
        schema.downgrade(url, revision.down_revision or "base")
        assert tables_in(url) == before
        schema.migrate(url, revision.revision)
        assert tables_in(url) == after
    schema.check(url)
    schema.downgrade(url, "base")
    assert tables_in(url) == set()
    assert schema.current(url) is None


def test_two_processes_may_migrate_at_once(url: str) -> None:
    command = [sys.executable, "-c", f"from feature_store import schema; schema.migrate({url!r})"]
    for process in [subprocess.Popen(command, cwd=FOLDER.parent) for _ in range(2)]:
        assert process.wait(60) == 0
    schema.check(url)


def test_the_code_needs_the_newest_revision() -> None:
    assert scripts().get_heads() == [SCHEMA_REVISION]


def test_an_unmigrated_or_old_database_is_refused(url: str) -> None:
    with pytest.raises(SchemaRevisionError, match="has no schema yet, this code needs"):
        schema.check(url)
    schema.migrate(url)
    run(url, "UPDATE alembic_version SET version_num = '0000'")
    with pytest.raises(SchemaRevisionError, match="is at schema revision 0000, this code needs"):
        schema.check(url)


def test_a_table_changed_by_hand_is_noticed(url: str) -> None:
    schema.migrate(url)
    run(url, "ALTER TABLE item ADD COLUMN colour TEXT")
    with pytest.raises(SchemaDriftError, match="colour"):
        schema.check(url)


def test_a_failing_migration_leaves_nothing_behind(url: str) -> None:
    run(url, "CREATE TABLE first_served (x INTEGER)")  # the last table the first revision builds
    with pytest.raises(Exception, match="first_served"):
        schema.migrate(url)
    assert tables_in(url) == {"first_served"}


def test_a_missing_directory_of_a_sqlite_file_is_made(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/deep/down/store.db"
    schema.migrate(url)
    schema.check(url)


def test_constraints_carry_names(url: str) -> None:
    schema.migrate(url)
    engine = create_engine(parse_url(url))
    inspector = inspect(engine)
    for table in metadata.tables:
        assert inspector.get_pk_constraint(table)["name"] == f"pk_{table}"
    engine.dispose()


def test_revisions_import_nothing_of_ours() -> None:
    for path in sorted((FOLDER / "versions").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] in {"alembic", "sqlalchemy", "__future__"}, f"{path.name} imports {name}"
