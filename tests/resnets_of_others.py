"""ResNets as users bring them: torchvision's structure, and one with functions for modules."""

import torch
import torch.nn.functional as F
from torch import nn


class TorchvisionBottleneck(nn.Module):
    """torchvision's block: one ReLU module in all places."""

    def __init__(self, inplanes, planes, stride=1, base_width=64, downsample=None):
        super().__init__()
        width = planes * base_width // 64
        self.conv1 = nn.Conv2d(inplanes, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class TorchvisionResNet(nn.Module):
    """torchvision's ImageNet network with four stages of one or two bottlenecks."""

    def __init__(self, blocks=(2, 1, 1, 1), base_width=64, planes=8, num_classes=10):
        super().__init__()
        self.inplanes = planes
        self.conv1 = nn.Conv2d(3, planes, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        for stage, count in enumerate(blocks):
            layer = self._make_layer(planes * 2**stage, count, min(stage + 1, 2), base_width)
            setattr(self, f"layer{stage + 1}", layer)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.inplanes, num_classes)

    def _make_layer(self, planes, count, stride, base_width):
        projection = nn.Sequential(
            nn.Conv2d(self.inplanes, 4 * planes, 1, stride, bias=False), nn.BatchNorm2d(4 * planes)
        )
        layers = [TorchvisionBottleneck(self.inplanes, planes, stride, base_width, projection)]
        self.inplanes = 4 * planes
        layers += [
            TorchvisionBottleneck(4 * planes, planes, 1, base_width) for _ in range(count - 1)
        ]
        return nn.Sequential(*layers)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class FunctionalBlock(nn.Module):
    """A basic block with ReLUs as functions and an empty sequence for an identity shortcut."""

    def __init__(self, channels, before_the_sum=False, first_norm=False):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        self.before_the_sum = before_the_sum
        self.first_norm = first_norm

    def forward(self, x):
        if self.first_norm:
            out = self.conv1(F.relu(self.bn1(x)))
            return self.conv2(F.relu(self.bn2(out))) + self.shortcut(x)
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.before_the_sum:
            return F.relu(out) + self.shortcut(x)
        return F.relu(out + self.shortcut(x))


class FunctionalResNet(nn.Module):
    """A CIFAR network with ReLUs and pool as functions, and `linear` for the readout."""

    def __init__(self, *blocks, width=8, outer_relu=True):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(*(blocks or (FunctionalBlock(width), FunctionalBlock(width))))
        self.linear = nn.Linear(width, 10)
        self.outer_relu = outer_relu

    def forward(self, x):
        x = self.bn1(self.conv1(x))
        x = self.layer1(F.relu(x) if self.outer_relu else x)
        return self.linear(F.avg_pool2d(x, x.shape[-1]).flatten(1))
