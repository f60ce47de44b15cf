"""PruneTrain as a callback of the real Hugging Face Trainer, and in a loop with Accelerate."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ptsim
from ptsim.errors import UsageError
from tests.training.nets import small

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from transformers.training_args import ParallelMode  # noqa: E402 - only where transformers is

from ptsim.integrations.huggingface import PruneTrainCallback  # noqa: E402 - the same

IMAGE = (3, 8, 8)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:the network has collapsed:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),  # Accelerate's loader, on a CPU
]


class Model(nn.Module):
    """By Hugging Face's convention: labels go in, the loss comes out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cnn = small(10)

    def forward(self, pixel_values, labels=None):
        logits = self.cnn(pixel_values)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits} if labels is not None else {"logits": logits}


class Images(torch.utils.data.Dataset):
    def __init__(self):
        random = torch.Generator().manual_seed(0)
        patterns = torch.rand(10, *IMAGE, generator=random)
        self.labels = torch.randint(10, (64,), generator=random)
        self.images = patterns[self.labels] + 0.1 * torch.randn(64, *IMAGE, generator=random)

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


class Killed(transformers.TrainerCallback):
    def on_step_begin(self, args, state, control, **parts):
        if state.epoch >= 3:
            raise RuntimeError("killed")


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def callback(folder, **more):
    options = {"penalty_ratio": 0.5, "interval": 2, "threshold": 0.12, "accuracy": "eval_accuracy"} | more
    return PruneTrainCallback(input_shape=IMAGE, network="cnn", record=folder, **options)


def trainer(folder, model, *callbacks, trainer_class=InOrder, **more):
    options = {
        "num_train_epochs": 5, "per_device_train_batch_size": 16, "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd", "optim_args": "momentum=0.9", "eval_strategy": "epoch", "save_strategy": "epoch",
        "report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False,
    } | more  # fmt: skip
    return trainer_class(
        model,
        transformers.TrainingArguments(folder, **options),
        train_dataset=Images(),
        eval_dataset=Images(),
        compute_metrics=accuracy,
        callbacks=list(callbacks),
    )


def test_it_prunes_records_and_goes_on_after_a_kill_to_the_same_network(tmp_path):
    whole = Model()
    trainer(tmp_path / "a", whole, callback(tmp_path / "whole")).train()
    trace = ptsim.read_trace(tmp_path / "whole")
    assert trace.complete
    assert len(trace.networks) > 1
    assert [(e.num_images, e.num_iterations, e.batch_per_gpu) for e in trace.epochs] == [(64, 4, 16)] * 5
    assert all(0 <= e.validation_accuracy <= 1 for e in trace.epochs)
    assert len(ptsim.simulate(tmp_path / "whole", "dgx-a100", gpus=[8])) == 1

    with pytest.raises(RuntimeError, match="killed"):
        trainer(tmp_path / "b", Model(), callback(tmp_path / "run"), Killed()).train()
    gc.collect()
    again, ours = Model(), callback(tmp_path / "run")
    checkpoint = tmp_path / "b" / "checkpoint-12"
    resuming = trainer(tmp_path / "b", again, ours)
    ours.restore(resuming, checkpoint)
    resuming.train(resume_from_checkpoint=str(checkpoint))
    for (name, mine), theirs in zip(again.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    resumed = ptsim.read_trace(tmp_path / "run")
    assert resumed.complete
    assert [e.architecture for e in resumed.epochs] == [e.architecture for e in trace.epochs]


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.TrainingArguments, "parallel_mode", ParallelMode.DISTRIBUTED)
    with pytest.raises(UsageError, match="keeps its DistributedDataParallel to the end"):
        trainer(tmp_path, Model(), callback(None)).train()


def test_a_training_that_was_left_by_an_error_can_be_followed_by_another(tmp_path):
    model, ours = Model(), callback(None)
    with pytest.raises(RuntimeError, match="killed"):
        trainer(tmp_path, model, ours, Killed()).train()
    trainer(tmp_path, model, ours, num_train_epochs=1).train()
    assert ours.pruner.recorder.epoch == 1
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_a_loss_that_compute_loss_makes_is_told(tmp_path):
    ours = callback(tmp_path / "run")

    class Smoothed(InOrder):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            output = model(inputs["pixel_values"])
            loss = F.cross_entropy(output["logits"], inputs["labels"], label_smoothing=0.1)
            if model.training:
                ours.tell(loss)
            return (loss, {"loss": loss, **output}) if return_outputs else loss

    options = {"learning_rate": 0.0, "num_train_epochs": 1, "gradient_accumulation_steps": 2, "save_strategy": "no"}
    trainer(tmp_path, Model(), ours, trainer_class=Smoothed, **options).train()
    data, fresh = Images(), Model()
    losses = [
        F.cross_entropy(fresh(x)["logits"], y, label_smoothing=0.1).item()
        for x, y in zip(data.images.split(16), data.labels.split(16), strict=True)
    ]
    epoch = ptsim.read_trace(tmp_path / "run").epochs[0]
    assert (epoch.num_images, epoch.num_iterations) == (64, 2)
    assert epoch.train_loss == pytest.approx(sum(losses) / 4, rel=1e-6)
    # Eq. 3 with a ratio of one half: the penalty is as large as the first loss, which is that of the first two passes.
    assert epoch.penalty == pytest.approx(sum(losses[:2]) / 2, rel=1e-5)


class Dividing(Model):
    """As the models of transformers: it is told the images of all passes of an update, and divides by these."""

    def forward(self, pixel_values, labels=None, num_items_in_batch=None, **more):
        logits = self.cnn(pixel_values)
        if labels is None:
            return {"logits": logits}
        total = F.cross_entropy(logits, labels, reduction="sum")
        return {"loss": total / (num_items_in_batch or len(labels)), "logits": logits}


def test_losses_that_are_parts_of_an_updates_loss_add_up(tmp_path):
    options = {"learning_rate": 0.0, "num_train_epochs": 1, "gradient_accumulation_steps": 2, "save_strategy": "no"}
    trainer(tmp_path, Dividing(), callback(tmp_path / "run"), **options).train()
    data, fresh = Images(), Model()
    batches = zip(data.images.split(16), data.labels.split(16), strict=True)
    losses = [fresh(images, labels)["loss"].item() for images, labels in batches]
    epoch = ptsim.read_trace(tmp_path / "run").epochs[0]
    assert (epoch.num_images, epoch.num_iterations) == (64, 2)
    assert epoch.train_loss == pytest.approx(sum(losses) / 4, rel=1e-5)
    # Eq. 3 with a ratio of one half: the penalty is as large as the first loss, which is that of the first two passes.
    assert epoch.penalty == pytest.approx(sum(losses[:2]) / 2, rel=1e-5)


def test_the_accuracy_may_be_that_of_any_of_several_validation_sets(tmp_path):
    for name in ("second", "third"):
        ours = callback(tmp_path / name, accuracy=f"eval_{name}_accuracy")
        training = trainer(tmp_path, Model(), ours, num_train_epochs=2, save_strategy="no")
        training.eval_dataset = {"first": Images(), "second": Images()}
        if name == "third":
            with pytest.raises(UsageError, match="nothing was logged as 'eval_third_accuracy' in this epoch"):
                training.train()
            continue
        training.train()
        epochs = ptsim.read_trace(tmp_path / name).epochs
        assert len(epochs) == 2
        assert all(epoch.validation_accuracy is not None for epoch in epochs)


def test_misuse_is_one_sentence(tmp_path):
    class Silent(Model):
        def forward(self, pixel_values, labels=None):
            return {"logits": self.cnn(pixel_values)}

    class OwnLoss(InOrder):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return F.cross_entropy(model(inputs["pixel_values"])["logits"], inputs["labels"])

    with pytest.raises(UsageError, match="the output of this Silent holds no loss"):
        trainer(tmp_path, Silent(), callback(None), trainer_class=OwnLoss).train()
    with pytest.raises(UsageError, match=r"holds no prunetrain\.json: it was written without PruneTrainCallback"):
        callback(None).restore(trainer(tmp_path, Model()), tmp_path)
    (tmp_path / "prunetrain.json").write_text("{")
    with pytest.raises(UsageError, match=r"prunetrain\.json is damaged"):
        callback(None).restore(trainer(tmp_path, Model()), tmp_path)


def test_the_best_checkpoint_is_not_loaded_into_the_pruned_network(tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy"}
    with pytest.raises(UsageError, match="load_best_model_at_end loads a checkpoint that may have more channels"):
        trainer(tmp_path, Model(), callback(None), **best).train()


def test_a_loop_with_accelerate_gives_what_it_has_prepared(tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = Model().cnn
    loader = torch.utils.data.DataLoader(Images(), batch_size=16)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05), loader)
    options = {"input_shape": IMAGE, "penalty_ratio": 0.5, "interval": 1, "threshold": 0.12}
    pruner = ptsim.PruneTrain(model, optimizer, record=tmp_path, scaler=accelerator.scaler, **options)
    for _ in range(3):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(batch["pixel_values"]), batch["labels"])
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    pruner.step(loss)
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        pruner.end_epoch()
    pruner.close()
    trace = ptsim.read_trace(tmp_path)
    assert [(e.num_images, e.num_iterations) for e in trace.epochs] == [(64, 2)] * 3
    assert len(trace.networks) > 1
