package main

import (
	"context"
	"fmt"
	"time"

	lua "github.com/yuin/gopher-lua"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// Argo CD stops a script after this time.
const scriptTimeout = time.Second

// An admin's script may use these libraries, and no `string` or `io`.
var libraries = []struct {
	name string
	open lua.LGFunction
}{
	{lua.LoadLibName, lua.OpenPackage}, // first: the others register with it
	{lua.BaseLibName, lua.OpenBase},
	{lua.TabLibName, lua.OpenTable},
}

// argo answers as Argo CD: an object that is being deleted has no script run; a script that fails, or returns anything
// but a table with a known status, makes it Unknown.
func argo(object *unstructured.Unstructured, script string) verdict {
	if object.GetDeletionTimestamp() != nil {
		return verdict{"Progressing", "Pending deletion"}
	}
	answer, err := runScript(object, script)
	if err != nil {
		return verdict{"Unknown", err.Error()}
	}
	table, ok := answer.(*lua.LTable)
	if !ok {
		return verdict{"Unknown", fmt.Sprintf("expect table output from Lua script, not %s", answer.Type())}
	}
	found := verdict{text(table, "status"), text(table, "message")}
	switch found.Status {
	case "Unknown", "Progressing", "Suspended", "Healthy", "Degraded", "Missing":
		return found
	}
	return verdict{"Unknown", "Lua returned an invalid health status"}
}

func runScript(object *unstructured.Unstructured, script string) (lua.LValue, error) {
	state := lua.NewState(lua.Options{SkipOpenLibs: true})
	defer state.Close()
	for _, library := range libraries {
		opened := lua.P{Fn: state.NewFunction(library.open), Protect: true}
		if err := state.CallByParam(opened, lua.LString(library.name)); err != nil {
			return nil, err
		}
	}
	limited, cancel := context.WithTimeout(context.Background(), scriptTimeout)
	defer cancel()
	state.SetContext(limited)
	state.SetGlobal("obj", value(state, object.Object))
	if err := state.DoString(script); err != nil {
		return nil, err
	}
	return state.Get(-1), nil
}

func text(table *lua.LTable, key string) string {
	if found, ok := table.RawGetString(key).(lua.LString); ok {
		return string(found)
	}
	return ""
}

// value makes Lua's of what JSON decodes to; null is nil, so that its field is absent.
func value(state *lua.LState, from any) lua.LValue {
	switch known := from.(type) {
	case bool:
		return lua.LBool(known)
	case int64:
		return lua.LNumber(known)
	case float64:
		return lua.LNumber(known)
	case string:
		return lua.LString(known)
	case []any:
		list := state.CreateTable(len(known), 0)
		for _, item := range known {
			list.Append(value(state, item))
		}
		return list
	case map[string]any:
		table := state.CreateTable(0, len(known))
		for key, item := range known {
			table.RawSetString(key, value(state, item))
		}
		return table
	}
	return lua.LNil
}
