import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from lit_distill.core.errors import UsageError
from lit_distill.core.schedules import Cosine
from lit_distill.image.distillation import Outputs, Shapes
from lit_distill.image.losses.logits import CurriculumTemperature
from lit_distill.image.methods.ctkd import CTKD


@pytest.mark.parametrize("per_sample", [False, True])
def test_method(check_method, per_sample):
    check_method(lambda student, teacher: CTKD(student, teacher, per_sample=per_sample), extra={"losses"})


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def kd_loss(z_s, z_t, t):
    t = np.broadcast_to(t, len(z_s))[:, None]
    return (t[:, 0] ** 2 * rel_entr(softmax(z_t / t, 1), softmax(z_s / t, 1)).sum(1)).mean()


def test_the_term_is_kd_at_the_initial_temperature(step, tiny, blobs):
    teacher = tiny(6, seed=5).eval()
    z_s, z_t = (x(blobs.images[:8]).detach().double().numpy() for x in (tiny(), teacher))
    _, terms = step(CTKD(tiny(), teacher, kd_weight=0.7))
    assert terms["ctkd"] == pytest.approx(0.7 * kd_loss(z_s, z_t, 1 + 20 / (1 + np.exp(-1))), rel=1e-3)


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_step_moves_the_temperature_to_where_the_loss_is_larger(step, tiny, blobs, per_sample):
    teacher = tiny(6, seed=5).eval()
    teacher.head.weight.data *= 20  # far from the student
    logits = [x(blobs.images[:8]).detach() for x in (tiny(), teacher)]

    def loss_after(reversal):
        module = CTKD(tiny(), teacher, 1.0, 3.0, reversal, per_sample, kd_weight=100.0, optimizer=sgd)
        step(module)
        # The same logits as before the step: what changed is the temperature alone.
        t = module.losses["ctkd"].temperature(*logits, 0.0).detach().double().numpy()
        return kd_loss(*(z.double().numpy() for z in logits), t)

    stayed = loss_after(0.0)
    assert loss_after(-1.0) > stayed * 1.001
    assert loss_after(1.0) < stayed * 0.999


def test_theta_stays_where_its_gradient_is_scaled_by_zero_and_moves_in_proportion(step, tiny):
    thetas = {}
    for reversal in (0.0, -0.5, -1.0):
        module = CTKD(tiny(), tiny(6, seed=5), reversal=reversal, optimizer=sgd)
        step(module)
        thetas[reversal] = module.losses["ctkd"].theta.item()
    assert thetas[0.0] == 1.0
    assert thetas[-1.0] != 1.0
    assert thetas[-1.0] - 1 == pytest.approx(2 * (thetas[-0.5] - 1), rel=1e-2)


def test_the_reversal_follows_its_schedule(trainer, blobs, tiny):
    seen = []
    module = CTKD(tiny(), tiny(6, seed=5), reversal=Cosine(0.0, -1.0, 2))
    loss = module.losses["ctkd"]
    temperature = loss.temperature
    loss.temperature = lambda s, t, reversal: seen.append(reversal) or temperature(s, t, reversal)
    trainer(max_epochs=2).fit(module, datamodule=blobs)
    assert seen == pytest.approx([0.0, -0.5, -1.0, -1.0, -1.0, -1.0])


@pytest.mark.parametrize("per_sample", [False, True])
def test_the_student_gets_the_gradient_of_kd_at_that_temperature(tiny, blobs, per_sample):
    loss = CurriculumTemperature(per_sample=per_sample)
    loss.build(Shapes({}, {}, 3))
    student, teacher = torch.randn(8, 3, requires_grad=True), torch.randn(8, 3, requires_grad=True)
    loss(Outputs(student, {}), Outputs(teacher, {}), blobs.batches()[0], 0).backward()
    t = loss.temperature(student, teacher, 0.0).detach().double().numpy()[:, None]
    z_s, z_t = student.detach().double().numpy(), teacher.detach().double().numpy()
    torch.testing.assert_close(
        student.grad.double(),
        torch.from_numpy(t * (softmax(z_s / t, 1) - softmax(z_t / t, 1)) / 8),
        rtol=1e-3,
        atol=1e-6,
    )
    assert teacher.grad is None


def test_defaults_are_the_papers(tiny):
    module = CTKD(tiny(), tiny())
    loss = module.losses["ctkd"]
    assert (loss.minimum, loss.span, loss.theta.item(), loss.reversal) == (1.0, 20.0, 1.0, -1.0)
    assert (module.weights["ctkd"], module.label_weight) == (0.9, 0.1)
    assert loss.temperature(torch.zeros(2, 3), torch.zeros(2, 3), -1.0).item() == pytest.approx(15.6, abs=0.03)


@pytest.mark.parametrize("key", ["minimum", "span"])
def test_temperatures_that_could_reach_zero_are_refused(key):
    with pytest.raises(UsageError, match=f"{key} is 0.0; it must be above 0"):
        CurriculumTemperature(**{key: 0.0})
