# Shoal. "make help" lists what there is.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS := -s -w -X main.version=$(VERSION)
GO_SOURCES := $(shell find . -name '*.go' -not -path './bin/*') go.mod go.sum
COUNTS := bin/test-counts
UNIT := $(shell go list ./... 2>/dev/null | grep -v -e /integration$$)
VM_TESTS := vip/ipvs integration

.PHONY: vms test-vms test-compose deb rpm tarball test-package help build test test-unit test-vet test-e2e test-vm chaos bench demo lab generate fmt clean setup

help: ## show this
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

build: bin/shoal bin/whoami bin/load ## build bin/shoal and the demo's tools

bin/shoal: $(GO_SOURCES)
	CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o $@ ./cmd/shoal

bin/whoami bin/load: bin/%: $(GO_SOURCES)
	CGO_ENABLED=0 go build -trimpath -o $@ ./internal/tools/$*

demo: build ## three nodes, a service, faults: what Shoal does, in a minute
	@scripts/setup demo
	@scripts/setup containers || echo "demo: no containerd can be had: it shows programs of this machine" >&2
	@scripts/demo

lab: build ## three nodes on this machine, to play with (make lab; shoal lab down)
	@scripts/setup demo
	@bin/shoal lab up --nodes 3

setup: ## install the Debian packages that are missing
	@scripts/setup

test: ## everything: vet, unit, real kernel, virtual machine; one summary
	@scripts/test

test-vet: ## gofmt, go vet, staticcheck
	@scripts/test vet

test-unit: ## packages' own tests, with -race; real-kernel ones need root
	@scripts/test unit

test-e2e: ## the built binary on several nodes
	@scripts/test e2e

test-vm: ## what needs IPVS, in a QEMU guest
	@scripts/test vm

vms: build deb ## three real machines in QEMU, to play with (vm/cluster down)
	@vm/cluster up --deb bin/package/shoal_*.deb

test-vms: ## the package on three machines in QEMU: killed, booted anew, upgraded
	@scripts/test vms

test-compose: ## deploy/compose: three nodes in containers, made from the package
	@scripts/test compose

SEED ?= 0
MINUTES ?= 2
chaos: build ## random commands and faults on five nodes (SEED=7 MINUTES=15)
	@scripts/setup test
	@mkdir -p tmp && go build -o tmp/chaos ./internal/tools/chaos
	@tmp/chaos -bin bin -seed $(SEED) -minutes $(MINUTES) $(CHAOS)

bench: build ## measure, and write docs/PERFORMANCE.md
	@scripts/setup bench vm
	@scripts/bench

generate: ## code from the .proto files
	go run ./internal/tools/genproto api shoal/v1/shoal.proto

deb: ## bin/package/shoal_VERSION_ARCH.deb: the same bytes whenever it is made
	@scripts/package deb

rpm: ## the same as an RPM package
	@scripts/package rpm

tarball: ## the same for other distributions, with an install script
	@scripts/package tarball

test-package: ## packages: reproducible, lintian, installed, upgraded, removed, purged
	@scripts/test package

fmt: ## gofmt
	gofmt -w $$(git ls-files '*.go' | grep -v '\.pb\.go$$')

clean: ## remove what was built
	rm -rf bin
