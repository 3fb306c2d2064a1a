#!/bin/bash
# Build Kubernetes 1.20.2 from Debian's source package into OUT: one binary, a symlink for each daemon.
# Usage: build.sh WORK_DIR OUT_DIR     (WORK_DIR is scratch; the caller removes it)
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
work=$1 out=$2
version=1.20.2
tarball=kubernetes_1.20.5+really$version.orig.tar.gz
mkdir -p "$work" "$out"
cd "$work"

# --- source: the Debian archives this machine already trusts, with their sources switched on in a private apt state
mkdir -p apt/lists/partial apt/cache/archives/partial
apt-get indextargets --format 'deb-src $(SITE) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' 'Origin: Debian' \
  | sort -u > apt/sources.list
[ -s apt/sources.list ] || { echo "apt knows no Debian archive: run 'apt-get update' first" >&2; exit 1; }
private_apt=(-o "Dir::Etc::sourcelist=$work/apt/sources.list" -o Dir::Etc::sourceparts=/dev/null
             -o "Dir::State::lists=$work/apt/lists" -o "Dir::Cache=$work/apt/cache")
apt-get "${private_apt[@]}" update -qq
apt-get "${private_apt[@]}" source -qq --download-only kubernetes
tar xf "$tarball"
src=$work/kubernetes-$version

# --- reflect2 1.0.1 as vendored reads Go's map internals of before Go 1.18: the API server dies at the first custom resource.
apt-get download -q golang-github-modern-go-reflect2-dev
dpkg-deb -x golang-github-modern-go-reflect2-dev_*.deb reflect2
rm -rf "$src/vendor/github.com/modern-go/reflect2"
cp -r reflect2/usr/share/gocode/src/github.com/modern-go/reflect2 "$src/vendor/github.com/modern-go/"

# --- GOPATH mode, as Debian builds it: this tree's go.mod is too old for -mod=vendor with Go 1.19
export GOPATH=$work/go GOCACHE=$work/go-cache GO111MODULE=off CGO_ENABLED=0 GOTOOLCHAIN=local
mkdir -p "$GOPATH/src/k8s.io"
ln -s "$src" "$GOPATH/src/k8s.io/kubernetes"
cd "$GOPATH/src/k8s.io/kubernetes"

# --- the one generated file the tarball lacks; openapi-gen exits 1 over naming rules it only reports
go build -o "$work/openapi-gen" ./vendor/k8s.io/kube-openapi/cmd/openapi-gen
packages=$(grep -rl --include='*.go' '+k8s:openapi-gen=' cmd pkg vendor/k8s.io/*/ \
  | grep -vE '_test\.go|/testdata/|zz_generated|vendor/k8s.io/(code-generator|sample-apiserver|kube-openapi|gengo)/' \
  | xargs -n1 dirname | sort -u | sed 's#^#k8s.io/kubernetes/#' | paste -sd,)
"$work/openapi-gen" -i "$packages" -p k8s.io/kubernetes/pkg/generated/openapi -O zz_generated.openapi \
  -h hack/boilerplate/boilerplate.generatego.txt -r "$work/naming-rules.txt" --output-base "$GOPATH/src" \
  || test -s pkg/generated/openapi/zz_generated.openapi.go

mkdir -p cmd/daemons
cp "$here/main.go" cmd/daemons/main.go
flags="-s -w"
for package in component-base/version client-go/pkg/version; do
  for pair in gitVersion=v$version gitMajor=1 gitMinor=20 gitTreeState=clean buildDate=2021-01-13T00:00:00Z; do
    flags+=" -X k8s.io/kubernetes/vendor/k8s.io/$package.$pair"
  done
done
go build -trimpath -tags providerless -ldflags "$flags" -o "$out/kubernetes" ./cmd/daemons
for daemon in kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy; do
  ln -sf kubernetes "$out/$daemon"
done
