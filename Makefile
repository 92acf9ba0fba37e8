# Every target works after a clone, with Go, git and make alone.

.DEFAULT_GOAL := help
GO ?= go
TOOL := $(GO) tool -modfile=tools.mod
FUZZTIME ?= 20s
HISTORIES ?= 300
SERIES := ^(TestCrash|TestHistories|TestAnyOrder|TestLostAnswers|TestSharedCallsThatFail|TestBuildSurvivesFaults)$$
BASE ?= HEAD~1
BENCH ?= LookUp|SignUpPooled|Layers
BENCHTIME ?= 1000x
GOFLAGS_RELEASE := -trimpath -ldflags "-s -w -X main.release=$(RELEASE)"

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: build
build: ## build the binaries into bin/
	$(GO) build $(GOFLAGS_RELEASE) -o bin/ ./cmd/...

.PHONY: run
run: build ## run the whole thing here: private Postgres, simulated Clarifai, Tenantry, a first tenant
	bin/sandbox

.PHONY: test
test: ## run the tests, all but the longest with the race detector (make check vets them)
	$(GO) test -race -vet=off -timeout 18m -skip '$(SERIES)' $$($(GO) list ./... | grep -v -e '/cmd/tenantry$$' -e '/test/cluster$$')
	$(GO) test -vet=off -timeout 10m ./cmd/tenantry ./test/cluster
	$(GO) test -vet=off -timeout 10m -run '$(SERIES)' ./internal/provision

.PHONY: check-full
check-full: ## run what takes too long for test: failovers and restores of real servers, all crashes, and HISTORIES (300) random histories
	CHECK_FULL=1 $(GO) test -timeout 60m -count 1 ./test/cluster
	CHECK_FULL=1 $(GO) test -timeout 30m -count 1 -run '^(TestCrash|TestAnyOrder)$$' ./internal/provision
	HISTORIES=$(HISTORIES) $(GO) test -timeout 120m -count 1 -run '^TestHistories$$' ./internal/provision

.PHONY: check
check: ## format, vet, staticcheck, the contract, generated code, modules
	@bad=$$(gofmt -l cmd internal api migrations test); [ -z "$$bad" ] || { echo "gofmt: $$bad"; exit 1; }
	$(GO) vet ./...
	$(TOOL) staticcheck ./...
	$(GO) mod tidy -diff
	$(GO) generate ./... && git diff --exit-code -- api/client

.PHONY: generate
generate: ## generate api/client from api/openapi.yaml
	$(GO) generate ./...

.PHONY: plans
plans: ## write the plan shapes of the statements on the hot paths anew
	$(GO) test ./internal/postgres -run ^TestPlans$$ -update

.PHONY: chaos
chaos: build ## kill and fault everything under load for CHAOS_SECONDS (180), and count what was lost
	bin/chaos

.PHONY: measure
measure: build ## measure recovery from kill -9, the share of the upstream rate that is reached, suspensions under load, and how fast changes spread
	bin/chaos measure

.PHONY: bench
bench: build ## measure look-ups, reveals, lists and sign-ups against pgbench and a bare handler; BENCH_SHORT=1 takes 3 minutes
	bin/bench

.PHONY: bench-growth
bench-growth: build ## measure the same with BENCH_TENANTS tenants (10 million: 15 GB of disk, half an hour) beside ten thousand
	bin/bench growth

# Each benchmark runs on both sides in turns, so that what else the machine does falls on both.
.PHONY: benchstat
benchstat: ## compare the handlers' Go benchmarks (BENCH, a regular expression) with those of the commit BASE (HEAD~1)
	@set -e; dir=$$(mktemp -d); trap 'git worktree remove --force $$dir/base 2>/dev/null; rm -rf $$dir' EXIT; \
	git worktree add --quiet --detach $$dir/base $(BASE); \
	(cd $$dir/base && $(GO) test -c -o $$dir/old ./internal/httpapi); $(GO) test -c -o $$dir/new ./internal/httpapi; \
	cd internal/httpapi; for i in 1 2 3 4 5 6 7 8 9 10; do for side in old new; do \
		$$dir/$$side -test.run '^$$' -test.bench '$(BENCH)' -test.benchmem -test.benchtime $(BENCHTIME) >>$$dir/$$side.txt || { cat $$dir/$$side.txt; exit 1; }; \
	done; done; cd ../..; $(TOOL) benchstat $$dir/old.txt $$dir/new.txt

.PHONY: fuzz
fuzz: ## fuzz what parses strangers' bytes, FUZZTIME each
	@for p in $$($(GO) list ./...); do \
		for f in $$($(GO) test -list '^Fuzz' $$p | grep '^Fuzz'); do \
			$(GO) test -run '^$$' -fuzz "^$$f$$" -fuzztime $(FUZZTIME) $$p || exit 1; \
		done; \
	done

.PHONY: image-check
image-check: ## build the image with buildah and start it; Debian, root
	deployments/image-check.sh

.PHONY: clean
clean: ## remove what was built; the sandbox's data stays
	rm -rf bin
