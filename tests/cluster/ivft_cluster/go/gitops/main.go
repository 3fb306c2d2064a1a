// Command gitops-health says what Flux and Argo CD make of objects: a JSON list of them on standard input, and the path
// of Argo CD's health script for their kind; a JSON list of verdicts on standard output, in the same order.
//
// Flux asks kstatus, which is linked here as it is. Argo CD is too large to link: `argo` does what its health package
// does for a kind that has a script.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/cli-utils/pkg/kstatus/status"
)

type verdict struct {
	Status  string `json:"status"`
	Message string `json:"message"`
}

type verdicts struct {
	Flux verdict `json:"flux"`
	Argo verdict `json:"argo"`
}

func main() {
	if err := run(os.Args[1:], os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "gitops-health:", err)
		os.Exit(1)
	}
}

func run(arguments []string, in io.Reader, out io.Writer) error {
	if len(arguments) != 1 {
		return fmt.Errorf("found %d arguments, expected the path of a Lua script", len(arguments))
	}
	script, err := os.ReadFile(arguments[0])
	if err != nil {
		return err
	}
	objects, err := read(in)
	if err != nil {
		return fmt.Errorf("standard input: %w", err)
	}
	all := make([]verdicts, 0, len(objects))
	for _, object := range objects {
		flux, err := flux(object)
		if err != nil {
			return fmt.Errorf("kstatus, %s: %w", object.GetName(), err)
		}
		all = append(all, verdicts{flux, argo(object, string(script))})
	}
	return json.NewEncoder(out).Encode(all)
}

// read decodes as Kubernetes clients do: whole numbers become int64, which both tools rely on.
func read(in io.Reader) ([]*unstructured.Unstructured, error) {
	var raws []json.RawMessage
	if err := json.NewDecoder(in).Decode(&raws); err != nil {
		return nil, err
	}
	objects := make([]*unstructured.Unstructured, len(raws))
	for index, raw := range raws {
		objects[index] = &unstructured.Unstructured{}
		if err := objects[index].UnmarshalJSON(raw); err != nil {
			return nil, err
		}
	}
	return objects, nil
}

func flux(object *unstructured.Unstructured) (verdict, error) {
	result, err := status.Compute(object)
	if err != nil {
		return verdict{}, err
	}
	return verdict{result.Status.String(), result.Message}, nil
}
