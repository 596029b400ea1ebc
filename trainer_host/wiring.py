"""The parts of the host, put together from settings: for the daemon and for the command line."""

from __future__ import annotations

import logging
from pathlib import Path
from threading import Event

from msgspec import Struct

from protocol.errors import Misconfigured
from trainer_host import keys
from trainer_host.database import Database
from trainer_host.progress import ProgressFile
from trainer_host.publisher import Jobs, Publisher
from trainer_host.recipes.table import RECIPES
from trainer_host.registry import Registry
from trainer_host.repository import Repository
from trainer_host.settings import Settings
from trainer_host.store import Store
from trainer_host.trainer import Trainer

log = logging.getLogger(__name__)

ONLINE_ROLES = ("snapshot", "timestamp")
RELEASING_ROLES = ("targets", *ONLINE_ROLES)


class Parts(Struct, frozen=True, kw_only=True):
    """What works together on one state folder.

    Attributes:
        can_release: Whether the key that signs releases is here.
    """

    settings: Settings
    database: Database
    store: Store
    registry: Registry
    repository: Repository
    publisher: Publisher
    trainer: Trainer
    can_release: bool


def assemble(settings: Settings, stop: Event | None = None) -> Parts:
    """Open the database and the repository, and load the keys.

    Without the targets key the host stores, serves chunks and keeps the metadata fresh, and cannot release.

    Raises:
        Misconfigured: There are no keys or no repository yet, or something cannot be opened.
        Unavailable: The database does not answer.
    """
    folder, passphrase = Path(settings.keys_dir), settings.passphrase()
    can_release = True
    try:
        signers = keys.load_signers(folder, RELEASING_ROLES, passphrase)
    except Misconfigured as error:
        signers = keys.load_signers(folder, ONLINE_ROLES, passphrase)
        log.warning("cannot release models here: %s", error)
        can_release = False
    repository = Repository(
        settings.repository_dir, signers, lifetimes=settings.lifetimes, kept_versions=settings.kept_versions
    )
    if not repository.exists:
        raise Misconfigured(f"no repository in {settings.repository_dir}. Make one first: trainer-host keys init")
    database = Database(settings.database)
    store, registry = Store(database), Registry(database)
    report, jobs = ProgressFile(settings.progress_file), Jobs(settings.jobs_dir, settings.training.kept_jobs)
    recipes = {recipe.slot: recipe for recipe in map(settings.recipe, RECIPES)}
    publisher = Publisher(repository, registry, settings.gate, jobs, recipes, report=report, stop=stop)
    return Parts(
        settings=settings,
        database=database,
        store=store,
        registry=registry,
        repository=repository,
        publisher=publisher,
        trainer=Trainer(store, publisher, jobs, settings.training, report=report, stop=stop),
        can_release=can_release,
    )
